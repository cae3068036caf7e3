"""rmm_lab: learn and measure Reinforced Model Merging (Han et al. 2025, arXiv:2503.21272).

    tasks -> experts -> layers -> env <- ppo -> layer path -> merged model

The modules here are the paper: ``operators``, ``layers``, ``path``, ``reward``, ``env``, ``ppo``; and
``matching``, merges that look at inputs. The folders are wings: ``families`` and ``tasks`` (models and data),
``formulas`` (further operators), ``engine`` (fast scoring), ``search`` (whole searches and run folders),
``fronts`` (searches for many answers), ``zoo`` (making checkpoints), ``figures``, ``evidence`` (the paper's
tables), ``course``.
"""

__version__ = "0.1.0"
