"""The bundled reader: fonts, drawn pictures, training, evaluation."""
