"""The compare app as a Hugging Face Space. `make space` puts all that it needs beside this file."""

from dywspan.app.page import launch, make_page

# Visitors choose among the models that are here. With any_model=True they load any model from the Hub.
page = make_page(any_model=False)

if __name__ == "__main__":
    launch(page)
