"""The language model: input stage, attention, MLP, blocks, and what each parameter is."""
