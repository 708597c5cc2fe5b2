"""The cost ledger: what is stored, computed and waited for."""
