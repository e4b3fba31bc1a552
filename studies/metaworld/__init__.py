"""Does a pruned π0 learn as well, faster? To be measured in MetaWorld, from nothing, on two cores. So far: the base.

    protocol    tasks, sizes and settings, chosen before any result
    base        demonstrations, tokenizer, and an 18-block π0 pre-trained on ten tasks

``python -m studies.metaworld base --work DIR``; what is finished is skipped, what was cut off goes on.
"""
