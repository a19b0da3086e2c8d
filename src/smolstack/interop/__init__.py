"""Other implementations beside smolstack: transformers as the reference that it is held against.

The one package that imports transformers. Nothing else in smolstack imports it, so that
transformers is needed by those who compare and by nobody who runs a model.
"""
