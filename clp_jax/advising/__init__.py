"""How deep for this checkpoint, these data and this budget: candidates, short trials, a verdict with its uncertainty.

Candidates are cuts at several depths by several criteria, each with several learning rates, and the model as it is.
Short fine-tunes with held-out loss compare them; half of each depth goes after every rung, the others train anew for
twice as long. All have the same time: a smaller model does more steps in it.
"""

from clp_jax.advising.candidates import Candidate, candidates_of
from clp_jax.advising.halving import Trial, halve
from clp_jax.advising.verdict import Place, Verdict, judge

__all__ = ["Candidate", "Place", "Trial", "Verdict", "candidates_of", "halve", "judge"]
