"""Registers the environments: `gymnasium.make("flexquant_rl.fq_env:FlexQuant/Decode-v1")`, and `make_vec`."""

from flexquant_rl.fq_env.registration import register_once_loaded

register_once_loaded()
