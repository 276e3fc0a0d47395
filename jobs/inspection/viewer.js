// A click on a thumbnail chooses its sample; one on a map or a photograph the patch below it.
element.addEventListener('click', event => {
  const tile = event.target.closest('[data-sample]');
  const cell = event.target.closest('.pick');
  if (tile) {
    trigger('click', {sample: Number(tile.dataset.sample)});
  } else if (cell) {
    const box = cell.getBoundingClientRect();
    trigger('click', {x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height});
  }
});
