"""Which decoder-only language models are known: where their modules are, and what their configs say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.families import limits
from rmm_lab.families.parts import Weights
from rmm_lab.families.protocol import Config

HEAD = "lm_head.weight"
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of attention, in transformers' words


@dataclass(frozen=True)
class Layout:
    """Where an architecture's modules are. ``trunk``: all but the head; ``sublayers``: norm and function."""

    trunk: str
    layers: str
    tokens: str
    norm: str
    sublayers: tuple[tuple[str, str], ...]
    positions: str = ""  # learned ones
    depth: str = "num_hidden_layers"  # what config.json calls the number of layers
    transposed: re.Pattern[str] = re.compile(
        r"(?!)"
    )  # matrices that files hold the other way round

    @property
    def stack(self) -> str:
        """What the names of layers' tensors begin with."""
        return f"{self.trunk}.{self.layers}"

    @property
    def names(self) -> dict[str, str]:
        """The embeddings' tensors: name in ``Stem`` -> name in a file."""
        own = {"tokens.weight": self.tokens, "positions.weight": self.positions}
        return {name: f"{self.trunk}.{at}.weight" for name, at in own.items() if at}


_PRE_NORM = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
_LLAMA = Layout("model", "layers", "embed_tokens", "norm", _PRE_NORM)
_POST_NORM = Layout("model", "layers", "embed_tokens", "norm", ())  # norms behind functions too
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "gpt2": Layout(
        "transformer",
        "h",
        "wte",
        "ln_f",
        (("ln_1", "attn"), ("ln_2", "mlp")),
        positions="wpe",
        depth="n_layer",
        transposed=re.compile(r".*\.(attn\.c_attn|(attn|mlp)\.c_proj|mlp\.c_fc)\.weight"),
    ),
    "gpt_neox": Layout(
        "gpt_neox",
        "layers",
        "embed_in",
        "final_layer_norm",
        (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp")),
    ),
}


def kinds_of(hf: Any) -> list[str]:
    """The kind of attention of each layer of a model with this config; InputError for others."""
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:
        windowed = hf.model_type == "mistral" and hf.sliding_window is not None
        kinds = [SLIDING if windowed else FULL] * hf.num_hidden_layers
    if odd := set(kinds) - {FULL, SLIDING}:
        raise InputError(
            f"config.json of a language model: expected {FULL} or {SLIDING} in 'layer_types', found "
            f"{min(odd)!r}; such layers are not supported"
        )
    return list(kinds)


def turned(weights: Mapping[str, Tensor], layout: Layout) -> Weights:
    """The same weights with GPT-2's matrices the other way round: from files, and back."""
    return {n: t.T if layout.transposed.fullmatch(n) else t for n, t in weights.items()}


def check_sublayers(hf: Any, layout: Layout) -> None:
    """Raise InputError unless a block is two sublayers in a row, each with a norm before it."""
    if layout.sublayers and not getattr(hf, "use_parallel_residual", False):
        return
    found = "norms behind them too" if not layout.sublayers else "both running side by side"
    raise InputError(
        f"config.json of a language model ({hf.model_type}): expected blocks of attention and MLP, one after "
        f"the other, each with a norm before it, found {found}; merge whole blocks: --unit block"
    )


def bare(config: Config) -> dict[str, Any]:
    """config.json without what does not hold for a model that we make, which is float32."""
    return {
        k: v
        for k, v in config.items()
        if k not in ("rmm_lab", "dtype", "torch_dtype", "_name_or_path")
    }


def model_class(hf: Any) -> Any:
    """transformers' class of a language model with this config, such as LlamaForCausalLM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(hf)]


def hf_config(config: Config, *, plain: bool = True) -> Any:
    """transformers' config of a config.json; InputError for what it or we do not know.

    plain: attention computed by plain matrix products, as we do; otherwise as transformers likes.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    if int(transformers.__version__.split(".")[0]) < 5:
        raise InputError(
            f"language models: expected transformers 5 or later, found {transformers.__version__}; run "
            "pip install -U transformers"
        )
    try:
        kind = CONFIG_MAPPING[config["model_type"]]
        arguments = limits.arguments(kind, config)
        hf = kind(**arguments, **({"attn_implementation": "eager"} if plain else {}))
        limits.check_sizes(hf)
    except Exception as error:  # huggingface_hub has errors of its own for this
        raise InputError(
            "config.json of a language model: expected arguments that transformers knows, found others "
            f"({' '.join(str(error).split())}); save the model with transformers again"
        ) from error
    for key, what in (
        ("scale_attn_by_inverse_layer_idx", "attention scores divided by the layer's number"),
        ("use_bidirectional_attention", "tokens that see later ones"),
        ("add_cross_attention", "cross-attention"),
    ):
        if getattr(hf, key, None):
            raise InputError(
                f"config.json of a language model: expected layers that compute the same in any place, each "
                f"token seeing those before it, found {what} ({key}); such models are not supported"
            )
    rope = getattr(hf, "rope_parameters", None) or {}
    if "longrope" in str(rope):
        raise InputError(
            "config.json of a language model: expected rotary positions that do not depend on the length of "
            "the text, found longrope; such models are not supported"
        )
    return hf
