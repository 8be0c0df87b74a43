"""Polylepis: pretraining of hybrid, multimodal Mamba models."""
