"""Repairs of cuts: closed-form least squares on hidden states, folded into stock weights."""
