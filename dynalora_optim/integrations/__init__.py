"""Where other people's training frameworks are met: one module for each, which imports it.

Nothing else in this package imports them, nor these modules: ``import dynalora_optim`` needs torch
only.
"""
