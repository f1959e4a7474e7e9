// What a user writes for each client: a function that opens a URL, calls got(name, id, data) for each event, and
// returns what closes it. A name's first word is the folder in node_modules. Each stream has a thread, so globals of
// its own.
import { spawn } from 'node:child_process';

const names = ['connection_open', 'task_event', 'version', 'error', 'connection_close'];
const standard = (EventSource, options) => (url, got) => {
  const source = new EventSource(url, options);
  // An "error" without data is the client's own.
  for (const name of names) source.addEventListener(name, (e) => e.data && got(name, e.lastEventId, e.data));
  return () => source.close();
};
const fetchEventSource = (options) => async () => {
  globalThis.window = globalThis; // what it needs of a browser
  globalThis.document = new EventTarget();
  const { fetchEventSource } = await import('@microsoft/fetch-event-source');
  return (url, got) => {
    const end = new AbortController();
    fetchEventSource(url, { signal: end.signal, onmessage: (e) => got(e.event, e.id, e.data), ...options });
    return () => end.abort();
  };
};
const plus = (options) => async () => {
  const { EventSourcePlus } = await import('event-source-plus');
  return (url, got) => {
    const controller = new EventSourcePlus(url).listen({
      onMessage(e) {
        got(e.event, e.id, e.data);
        if (options.abortAtEnd && e.event === 'connection_close') controller.abort();
      },
    });
    return () => controller.abort();
  };
};
const sse = (options) => async () => {
  const { Window } = await import('happy-dom'); // for XMLHttpRequest
  const { SSE } = await import('sse.js');
  return (url, got) => {
    globalThis.XMLHttpRequest = new Window({ url }).XMLHttpRequest;
    return standard(SSE, options)(url, got);
  };
};

export const clients = {
  'eventsource5': async () => standard((await import('eventsource5')).EventSource),
  'eventsource': async () => standard((await import('eventsource')).EventSource),
  'eventsource2': async () => standard((await import('eventsource2')).default),
  'undici': async () => standard((await import('undici')).EventSource),
  'eventsource-client': async () => {
    const { createEventSource } = await import('eventsource-client');
    return (url, got) => {
      const source = createEventSource({ url, onMessage: (e) => got(e.event, e.id, e.data) });
      return () => source.close();
    };
  },
  '@microsoft/fetch-event-source': fetchEventSource({}),
  '@microsoft/fetch-event-source with lines': fetchEventSource({
    openWhenHidden: true,
    onclose() { throw new Error('the stream has ended, the task perhaps not'); },
  }),
  'event-source-polyfill': async () => standard((await import('event-source-polyfill')).default.EventSourcePolyfill),
  'event-source-plus': plus({}),
  'event-source-plus with lines': plus({ abortAtEnd: true }),
  'sse.js': sse({}),
  'sse.js with lines': sse({ autoReconnect: true }),
  'launchdarkly-eventsource': async () => standard((await import('launchdarkly-eventsource')).default.EventSource),
  'extended-eventsource': async () => standard((await import('extended-eventsource')).EventSource),
  'reconnecting-eventsource': async () => {
    globalThis.EventSource = (await import('eventsource')).EventSource;
    const m = await import('reconnecting-eventsource');
    return standard(m.default.default ?? m.default);
  },
  'curl': async () => (url, got) => {
    const child = spawn('curl', ['-sN', url]);
    let text = '', event = {};
    child.stdout.on('data', (piece) => {
      const lines = (text + piece).split('\n');
      text = lines.pop();
      for (const line of lines) {
        if (line === '') { got(event.event, event.id, event.data); event = {}; }
        const [, field, value] = /^(\w+): (.*)/.exec(line) ?? [];
        if (field) event[field] = value;
      }
    });
    return () => child.kill();
  },
};
