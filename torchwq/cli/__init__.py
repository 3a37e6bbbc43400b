"""``python -m torchwq``: what this machine has for torchwq, and what torchwq brings here."""
