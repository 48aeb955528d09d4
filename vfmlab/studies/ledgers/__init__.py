"""Ledgers of claims, one file each. Adding a claim is one record; see :mod:`vfmlab.studies.claims`."""
