"""Installs and drives real SGLang servers on the CPU, with tiny models."""
