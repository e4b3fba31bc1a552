"""Between a robot's numbers and a model's: arithmetic, statistics, prompts, and robots as data.

transforms   the arithmetic between a robot and a model, forth and back
norm_stats   statistics for normalisation, in openpi's file format
tokenizer    prompts to token ids
robots       which column goes where, and what a robot's numbers mean
"""
