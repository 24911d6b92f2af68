"""What is made of scores: tables, figures, ledger."""
