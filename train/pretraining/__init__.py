"""Pre-training from scratch: a model, a corpus, and a way to learn all of its weights with little memory.

config      every field with its default
methods     what is trained and how: AdamW, GaLore, FRUGAL, LISA, SLTrain, LoRA, ...
corpus      text as tokens, with a tokenizer that is given or trained
run         a configuration, loaded
step        one update, and one refresh
loop        the run: resumable, with checkpoints, a table and a plot
"""
