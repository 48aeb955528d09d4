() => {
  // A divider moves its own picture, and those of all other cards beside it where the box "together" is set.
  window.vlCut = (slider) => {
    const cards = slider.closest('.vl-cards');
    const together = cards.querySelector('.vl-together input');
    const figures = together && together.checked ? cards.querySelectorAll('figure') : [slider.closest('figure')];
    figures.forEach((figure) => {
      const picture = figure.querySelector('.vl-compare');
      if (!picture) return;
      picture.style.setProperty('--cut', slider.value + '%');
      figure.querySelector('input[type=range]').value = slider.value;
    });
  };
  // One frame of a strip of equal squares.
  window.vlFrame = (slider) => {
    const share = slider.max > 0 ? slider.value / slider.max * 100 : 0;
    slider.previousElementSibling.style.backgroundPosition = share + '% 0';
  };
  // A click on a point writes the run's id into the list beside the figures, as a person would by keyboard.
  const attach = () => document.querySelectorAll('#vl-compare .js-plotly-plot').forEach((plot) => {
    if (plot.dataset.vl || !plot.on) return;
    plot.dataset.vl = '1';
    plot.on('plotly_click', (event) => {
      const box = document.querySelector('#vl-picked textarea, #vl-picked input');
      const id = event.points[0].customdata;
      if (!box || !id) return;
      box.value = id;
      box.dispatchEvent(new Event('input', {bubbles: true}));
    });
  });
  setInterval(attach, 500);
}
