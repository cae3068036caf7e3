"""rmm_lab: learn and measure Reinforced Model Merging (Han et al. 2025, arXiv:2503.21272).

    tasks -> experts -> pool of layers -> env <- ppo -> layer path -> merged model

Import the modules you need: ``operators``, ``models``, ``pool``, ``path``, ``scoring``, ``env``, ``ppo``.
"""

__version__ = "0.1.0"
