"""What a program will need on machines that are not here: compiled by their compiler, counted, bounded.

topologies   names like v5e:4x4 to devices to compile for
chips        what a chip is sold as
programs     what analyse, finetune and serve run, on shapes instead of arrays
operations   matrix products in a traced program, loops multiplied out
hlo          collectives in a compiled program, loops multiplied out
forecast     memory, operations and a lower bound of the time, per chip
picture      the plot
"""
