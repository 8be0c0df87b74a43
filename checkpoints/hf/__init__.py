"""Export to Hugging Face: `targets` (which class fits), `layout` (names), `export` (files), `verify` (proof).

`configuration_polylepis`, `layers_polylepis` and `modeling_polylepis` are copied into exported folders; `register`
makes them known to transformers where this package is installed.
"""
