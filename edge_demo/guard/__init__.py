"""A guard: a model in ShieldGemma's form that judges texts."""
