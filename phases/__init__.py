"""How finetuning learns each kind of rows: texts, images, preferences, rewards of own answers."""
