"""The measurements behind docs/conversion.md and docs/claims.md, each step once, resumable at any moment."""
