"""Tensors' names of transformers' vision models, in timm and back."""

from __future__ import annotations

import re

# Names in files and modules of all releases -> timm's; tried in turn.
_NAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^(?:(?:vit|deit|dinov2|dinov2_with_registers|vision_model)\.)+", ""),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
        (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
        (r"\.(?:attention\.attention|attention|self_attn)\.(query|key|value)\.", r".attn.\1."),
        (r"\.(?:attention|self_attn)\.q_proj\.", ".attn.query."),
        (r"\.(?:attention|self_attn)\.k_proj\.", ".attn.key."),
        (r"\.(?:attention|self_attn)\.v_proj\.", ".attn.value."),
        (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),  # SwiGLU
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
        (r"^embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
        (r"^(?:layernorm|post_layernorm)\.", "norm."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(?:classifier|cls_classifier)\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )
)
# timm's names, with queries, keys and values apart -> those of DINOv2's files on the hub.
_HUB_NAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^head\.", "classifier."),
        (r"^norm\.", "layernorm."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^mask_token$", "embeddings.mask_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.(\d+)\.attn\.(query|key|value)\.", r"blocks.\1.attention.attention.\2."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attention.output.dense."),
        (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"blocks.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    )
)


def timm_name(name: str) -> str:
    """A tensor's name in any of transformers' releases -> in timm, but for the parts that are joined."""
    for pattern, new in _NAMES:
        name = pattern.sub(new, name)
    return name


def hub_name(name: str, model: str = "dinov2") -> str:
    """A tensor's name in timm, with queries, keys and values apart -> in DINOv2's files.

    model: what the names of all but the classifier begin with.
    """
    for pattern, new in _HUB_NAMES:
        name = pattern.sub(new, name)
    return name if name.startswith("classifier.") else f"{model}.{name}"
