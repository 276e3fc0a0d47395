"""SAK (Lu, Cao, Wang: Swiss Army Knife, ICLR 2025): one stem, and an adapter path for each teacher."""
