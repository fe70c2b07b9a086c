"""Integrations with other training frameworks: one module for each, which imports the framework.

Nothing else in this package imports these frameworks or modules, so that ``import dynalora_optim``
needs only torch.
"""
