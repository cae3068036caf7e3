"""rmm_lab: learn and measure Reinforced Model Merging (Han et al. 2025, arXiv:2503.21272).

    tasks -> experts -> layers -> env <- ppo -> layer path -> merged model

The modules here are the paper: ``operators``, ``layers``, ``path``, ``reward``, ``env``, ``ppo``. The folders
are wings: ``families`` and ``tasks`` (models and data), ``engine`` (fast scoring), ``search`` (whole searches
and run folders), ``zoo`` (making checkpoints), ``figures``, ``evidence`` (the paper's tables), ``course``.
"""

__version__ = "0.1.0"
