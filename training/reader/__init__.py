"""The bundled reader: fonts, drawn images, training, evaluation."""
