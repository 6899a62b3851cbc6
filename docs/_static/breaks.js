// Names in tables and headings may break after a mark in them, and not in the middle of a word.
document.addEventListener("DOMContentLoaded", () => {
  for (const name of document.querySelectorAll(".bd-article :is(td, th, h1, h2, h3) code .pre")) {
    const [first, ...others] = name.textContent.split(/(?<=[_(.,=/])(?=[^\s.)])/);
    name.replaceChildren(first, ...others.flatMap((part) => [document.createElement("wbr"), part]));
  }
});
