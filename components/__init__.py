"""One file for each KFP step. A step calls one `locvlm` verb, writes a small receipt and returns a fingerprint.

Large things lie in the run's folder `root`, which every step and every Ray worker can reach; steps hand each other the
fingerprints of what lies there. A cached step takes `code_version` and the fingerprints of its inputs: KFP's caches
notice neither new code in an image nor new data behind a path.
"""
