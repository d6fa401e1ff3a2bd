"""What distillation needs beside its trainer: the teacher and its cache, losses, tokenizer gate, students cut out."""
