"""Copies between an engine's KV memory and pool slots: one small interface, one file per kind of device."""
