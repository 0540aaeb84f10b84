"""Registers the environments: `gymnasium.make("flexquant_rl.fq_env:FlexQuant/Decode-v0")`, and `make_vec`."""

import gymnasium

for _name, _measured in (("FlexQuant/Decode-v0", False), ("FlexQuant/MeasuredDecode-v0", True)):
    gymnasium.register(
        id=_name,
        entry_point="flexquant_rl.fq_env.making:DecodeEnvironment",
        vector_entry_point="flexquant_rl.fq_env.making:VectorDecodeEnvironment",
        kwargs={"measured": _measured},
        nondeterministic=_measured,
    )
