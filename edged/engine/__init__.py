"""The job engine: facts, next step, do, commit; again.

``loop`` claims due jobs, ``runner`` takes one job as far as it goes, ``images`` keeps what is flashed on disk, ``transfer``
watches a transfer, ``trust`` answers which releases may be installed, ``reconciler`` turns wishes into jobs.
"""
