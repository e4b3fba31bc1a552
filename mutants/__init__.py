"""Deliberate faults in the code, and a program that proves that the tests notice each of them: ``make mutants``.

A fault replaces one piece of text, which must occur exactly once in its file: a fault that no longer applies is an
error, not a success. A new test of a number deserves a fault here that it alone would catch.
"""
