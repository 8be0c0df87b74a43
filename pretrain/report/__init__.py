"""`polylepis report RUN`: one self-contained HTML page about a run."""
