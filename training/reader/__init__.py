"""The bundled reader: fonts, drawn pictures, training in three stages, evaluation."""
