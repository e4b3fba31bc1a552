"""All faults, by what they are faults of."""

from mutants.faults import carrying, data, groot, measuring, pi0, simulators, smolvla, training
from mutants.mutant import Mutant

MUTANTS: list[Mutant] = [
    *measuring.MUTANTS,
    *pi0.MUTANTS,
    *smolvla.MUTANTS,
    *groot.MUTANTS,
    *training.MUTANTS,
    *data.MUTANTS,
    *carrying.MUTANTS,
    *simulators.MUTANTS,
]
