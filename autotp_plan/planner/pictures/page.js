"use strict";
// Both need no network, and the page is complete without them: search by name, and another theme.
const root = document.documentElement;
document.querySelectorAll("[hidden].js").forEach((element) => { element.hidden = false; });
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
// model.layers.17.mlp finds model.layers.{0..31}.mlp: numbers are compared as numbers.
const holds = (braces, number) => braces.split(",").some((part) => {
  const ends = part.split("..").map(Number);
  return ends[0] <= number && number <= ends[ends.length - 1];
});
const blur = (text) => text.replace(/\{[^{}]*\}|\d+/g, "#");
const matches = (name, query) => {
  if (name.includes(query)) return true;
  const at = blur(name).indexOf(blur(query));
  if (at < 0) return false;
  const before = (blur(name).slice(0, at).match(/#/g) || []).length;
  const inName = name.match(/\{[^{}]*\}|\d+/g) || [];
  const inQuery = query.match(/\{[^{}]*\}|\d+/g) || [];
  return inQuery.every((word, place) => {
    const own = inName[before + place];
    return own === word || (own[0] === "{" && word[0] !== "{" && holds(own.slice(1, -1), Number(word)));
  });
};
const search = document.getElementById("search");
const found = document.getElementById("found");
search.addEventListener("input", () => {
  const query = search.value.trim().toLowerCase();
  let count = 0;
  document.querySelectorAll("[data-name]").forEach((element) => {
    const hit = query === "" || matches(element.dataset.name.toLowerCase(), query);
    element.classList.toggle("faded", !hit);
    element.classList.toggle("hit", hit && query !== "");
    if (hit && element.tagName === "TR") count += 1;
  });
  document.querySelectorAll("tr.prefix").forEach((row) => row.classList.toggle("faded", query !== ""));
  found.textContent = query === "" ? "" : `${count} of the table's rows`;
});
