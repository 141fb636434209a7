"""An LSTM language model that is trained with ckptstore: a thin program that shows how little it takes."""
