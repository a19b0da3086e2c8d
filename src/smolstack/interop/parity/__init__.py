"""``python -m smolstack.interop.parity``: every published shape against transformers, by stage."""
