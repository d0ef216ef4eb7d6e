"""Real photographs: a dozen that installable packages carry, with words written for them."""
