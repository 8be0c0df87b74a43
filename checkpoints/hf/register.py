"""Make `polylepis` known to transformers' Auto classes, so that no remote code is needed where we are installed."""

from __future__ import annotations


def register() -> None:
    """Register configuration and models; calling it again changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .configuration_polylepis import PolylepisConfig
    from .modeling_polylepis import PolylepisForCausalLM, PolylepisModel

    AutoConfig.register(PolylepisConfig.model_type, PolylepisConfig, exist_ok=True)
    AutoModel.register(PolylepisConfig, PolylepisModel, exist_ok=True)
    AutoModelForCausalLM.register(PolylepisConfig, PolylepisForCausalLM, exist_ok=True)
