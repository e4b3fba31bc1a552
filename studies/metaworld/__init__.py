"""Does a pruned π0 learn as well, faster? Measured in MetaWorld, from nothing, on two cores.

    protocol    tasks, sizes, data regimes, arms: everything that was chosen before looking at results
    base        demonstrations, tokenizer, and an 18-block π0 pre-trained on ten tasks
    arms        which blocks every criterion keeps, and the models that start without them
    recover     fine-tuning of every arm on the held-out tasks
    measure     success of what was fine-tuned
    ranks       predicted against real damage over random masks
    page        tables and plots from the JSON files

``python -m studies.metaworld STAGE --work DIR`` runs one; what is finished is skipped, what was cut off goes on.
"""
