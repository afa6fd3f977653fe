"""What a page does in the browser: filters its samples, and where it is live, fetches itself again."""

FILTER = """
'use strict';
function sift(section) {
  const find = section.querySelector('.find');
  if (!find) return;
  const words = find.value.toLowerCase();
  const changed = section.querySelector('.changed').checked;
  const order = section.querySelector('.order').value;
  const list = section.querySelector('.list');
  const boxes = Array.from(list.children);
  const gain = box => Number(box.dataset.gain);
  boxes.sort((a, b) => (order === 'down' ? gain(b) - gain(a) : order === 'up' ? gain(a) - gain(b) : 0)
    || Number(a.dataset.place) - Number(b.dataset.place));
  let count = 0;
  for (const box of boxes) {
    box.hidden = (changed && box.dataset.changed !== 'yes') || !box.textContent.toLowerCase().includes(words);
    count += box.hidden ? 0 : 1;
    list.append(box);
  }
  section.querySelector('.count').textContent = count + ' of ' + boxes.length;
}
function siftAll() { document.querySelectorAll('.samples').forEach(sift); }
for (const kind of ['input', 'change']) {
  document.addEventListener(kind, event => {
    const section = event.target.closest('.samples');
    if (section) sift(section);
  });
}
siftAll();
"""

LIVE = """
async function refresh() {
  let text;
  try {
    const answer = await fetch('content', {cache: 'no-store'});
    if (!answer.ok) return;
    text = await answer.text();
  } catch (error) { return; }
  const page = document.getElementById('page');
  if (page.dataset.last === text) return;
  const active = document.activeElement;
  if (active && page.contains(active) && active.matches('.find')) return;
  const kept = Array.from(page.querySelectorAll('.samples')).map(section => [
    section.querySelector('.find')?.value, section.querySelector('.changed')?.checked, section.querySelector('.order')?.value]);
  const open = Array.from(page.querySelectorAll('details')).map(one => one.open);
  page.innerHTML = text;
  page.dataset.last = text;
  page.querySelectorAll('details').forEach((one, place) => { one.open = open[place] || false; });
  page.querySelectorAll('.samples').forEach((section, place) => {
    const before = kept[place];
    if (!before || !section.querySelector('.find') || before[0] === undefined) return;
    section.querySelector('.find').value = before[0];
    section.querySelector('.changed').checked = before[1];
    section.querySelector('.order').value = before[2];
  });
  siftAll();
}
setInterval(refresh, 3000);
"""
