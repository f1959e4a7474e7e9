// POST /internal/send: how events come to the gateway. The streams that they go to are in stream.go; who may have one
// is in sidecar.go.

package main

import (
	"bytes"
	"fmt"
	"math"
	"net/http"
	"sync"
	"time"
)

const (
	maxSend  = 1 << 20    // bytes of a body, or of a line of a batch
	maxBatch = 4 << 20    // bytes of a batch
	maxRetry = 86_400_000 // milliseconds that an event may ask for, a day
)

// sendRequest is the body of POST /internal/send. With neither an event nor end it only asks whether the stream is
// alive. All that is bytes is part of the body that it was read from.
type sendRequest struct {
	token []byte
	event sentEvent
	end   bool
}

var (
	errNoToken    = badRequest("bad_token", "token is missing or empty")
	errNoData     = badRequest("bad_event", "event data is missing")
	errEventField = badRequest("bad_event", "event name and id must not contain CR, LF or NUL")
	errEventRetry = badRequest("bad_event", "event retry must be a whole number of milliseconds from 1 to 86400000")
)

// parseSend reads a body or a line, whose strings it decodes in place.
func parseSend(body []byte) (m sendRequest, err error) {
	if len(body) > maxSend {
		return m, errBodyTooLarge
	}
	var token, end []byte
	var e eventFields
	if err := pick(body, member{"token", &token, nil}, e.field(), member{"close", &end, nil}); err != nil {
		return m, err
	}
	if m.token, err = parseText(token); err == nil && len(m.token) == 0 {
		err = errNoToken
	}
	if err == nil {
		m.event, err = e.parse()
	}
	if err == nil {
		m.end, err = parseBool(end)
	}
	return m, err
}

// eventFields are the member "event" of an object, and its members.
type eventFields struct{ text, id, name, data, retry []byte }

func (f *eventFields) field() member {
	return member{"event", &f.text, []member{{"id", &f.id, nil}, {"name", &f.name, nil}, {"data", &f.data, nil}, {"retry", &f.retry, nil}}}
}

func (f *eventFields) parse() (e sentEvent, err error) {
	switch {
	case f.text == nil:
		return e, nil
	case f.text[0] != '{':
		return e, errFieldType
	case f.data == nil:
		return e, errNoData
	}
	if e.id, err = parseText(f.id); err == nil {
		e.name, err = parseText(f.name)
	}
	if err == nil && !(isOneLine(e.id) && isOneLine(e.name)) {
		err = errEventField
	}
	if err == nil {
		e.data, err = parseText(f.data)
		e.oneLine = len(e.data) == len(f.data)-len(`""`) // an escape would be longer than what it says
	}
	if err == nil && f.retry != nil {
		e.retry, err = parseRetry(f.retry)
	}
	return e, err
}

func parseRetry(raw []byte) (int, error) {
	n, err := parseNumber(raw)
	if err == nil && (n != math.Trunc(n) || n < 1 || n > maxRetry) {
		return 0, errEventRetry
	}
	return int(n), err
}

// parseText decodes a JSON string in place; that of an absent one is nil.
func parseText(raw []byte) ([]byte, error) {
	switch byteAt(raw, 0) {
	case 0:
		return nil, nil
	case '"':
		return unquote(raw), nil
	}
	return nil, errFieldType
}

// parseBool decodes a JSON bool; an absent one is false.
func parseBool(raw []byte) (bool, error) {
	switch string(raw) {
	case "true":
		return true, nil
	case "false", "":
		return false, nil
	}
	return false, errFieldType
}

// bodies are buffers for those of /internal/send.
var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// serveSend is POST /internal/send. If it can, it takes the connection over for the requests that will follow: see
// sendLoop.
func (g *gateway) serveSend(w http.ResponseWriter, r *http.Request) {
	w = uncounted(w)
	mediaType, limit := jsonType, int64(maxSend)
	if hasMediaType(r, ndjson) {
		mediaType, limit = ndjson, maxBatch
	} else if !isJSON(r) {
		g.met.events.with("invalid").Inc()
		writeError(w, errMediaType)
		return
	}
	buf := bodies.Get().(*bytes.Buffer)
	buf.Reset()
	body, err := readBody(w, r, limit, buf)
	if err != nil {
		g.met.events.with("invalid").Inc()
		writeError(w, err)
		return
	}
	status, text := g.answerSend(nil, mediaType, body)
	bodies.Put(buf) // not deferred: keepSending lasts as long as the connection
	if r.ProtoAtLeast(1, 1) && !r.Close {
		if conn, rw, err := http.NewResponseController(w).Hijack(); err == nil {
			g.keepSending(conn, rw.Reader, appendAnswer(nil, time.Now(), mediaType, status, text))
			return
		}
	}
	w.Header().Set("Content-Type", mediaType)
	w.WriteHeader(status)
	w.Write(text)
}

// answerSend does what the body of POST /internal/send says. It returns the status of the answer and its body, appended
// to text.
func (g *gateway) answerSend(text []byte, mediaType string, body []byte) (int, []byte) {
	if mediaType == ndjson {
		return http.StatusOK, g.answerBatch(text, body)
	}
	a := g.take(parseSend(body))
	return a.status, append(append(text, a.body...), '\n')
}

// answerBatch does what the lines of a batch say, and appends a line about each to text. Events in a row for the same
// stream are written at once.
func (g *gateway) answerBatch(text, body []byte) []byte {
	f := burst{g: g, buf: chunkBuffers.Get().(*[]byte)}
	defer chunkBuffers.Put(f.buf)
	write := func() {
		if n := f.events; n > 0 {
			line := f.write(false).answer().line
			for range n {
				text = append(append(text, line...), '\n')
			}
		}
	}
	for line := range bytes.Lines(body) {
		if line = bytes.Trim(line, " \t\r\n"); len(line) == 0 {
			continue
		}
		m, err := parseSend(line)
		if err != nil || m.event.data == nil || m.end {
			write()
			text = append(append(text, g.take(m, err).line...), '\n')
			continue
		}
		if f.s == nil || f.s.token != string(m.token) || !f.fits(len(line)) {
			write()
			f.s = g.lookup(m.token)
		}
		f.add(m.event)
	}
	write()
	return text
}

// sendAnswer is the answer to one send: by itself, and as a line that answers one of a batch.
type sendAnswer struct {
	status     int
	body, line string
}

// take carries out a send, unless reading it failed.
func (g *gateway) take(m sendRequest, err error) sendAnswer {
	if err == nil {
		return g.send(m).answer()
	}
	g.met.events.with("invalid").Inc()
	text := fmt.Sprintf(`"error":%q}`, err.Error())
	if err == errBodyTooLarge { // a line: a body of its own has been refused before
		return sendAnswer{http.StatusRequestEntityTooLarge, "{" + text, `{"status":413}`}
	}
	return sendAnswer{http.StatusBadRequest, "{" + text, `{"status":400,` + text}
}

func (s sendStatus) answer() sendAnswer {
	switch s {
	case sendWritten:
		return sendAnswer{http.StatusOK, batchOK, batchOK}
	case sendBuffered:
		return sendAnswer{http.StatusOK, batchBuffered, batchBuffered}
	}
	return sendAnswer{http.StatusNotFound, `{"error":"unknown token"}`, batchUnknown}
}

// send gives an event to its stream.
func (g *gateway) send(m sendRequest) sendStatus {
	f := burst{g: g, s: g.lookup(m.token), buf: chunkBuffers.Get().(*[]byte)}
	defer chunkBuffers.Put(f.buf)
	if m.event.data != nil {
		f.add(m.event)
	}
	return f.write(m.end)
}

// directSender is the gateway to a backend in the same process, which needs no POST.
type directSender struct{ *gateway }

// send gives the events to the stream of token: see gatewayClient.send.
func (d directSender) send(token string, events []event, end bool) (r sendResult) {
	f := burst{g: d.gateway, s: d.lookup([]byte(token)), buf: chunkBuffers.Get().(*[]byte)}
	defer chunkBuffers.Put(f.buf)
	for {
		for _, e := range events[r.taken:] {
			if !f.fits(len(e.Data)) {
				break
			}
			f.add(sentEvent{id: []byte(e.ID), name: []byte(e.Name), data: []byte(e.Data), retry: e.Retry})
		}
		n := f.events
		status := f.write(end)
		if status == sendUnknown {
			r.err = errUnknownToken
			return r
		}
		r.taken, r.buffered = r.taken+n, status == sendBuffered
		if r.taken == len(events) {
			return r
		}
	}
}

// maxFrame is how many bytes several events have at most that are written at once.
const maxFrame = 64 << 10

// maxGrowth bounds how much longer an event is than its line: `\n` becomes a line end and "data: ".
const maxGrowth = 4

// burst is one or more events for a stream that are written at once. All of them are taken, or none.
type burst struct {
	g      *gateway
	s      *stream // nil if the token is unknown
	buf    *[]byte
	events int
}

// fits reports whether an event whose line or data has this size may be written with those before it. The stream's
// buffer must have room for what the socket may leave of them.
func (b *burst) fits(size int) bool {
	return b.events == 0 || len(*b.buf)+maxGrowth*size <= min(maxFrame, b.g.limits.buffer)
}

func (b *burst) add(e sentEvent) {
	if b.events == 0 {
		*b.buf = reserveChunk(*b.buf)
	}
	*b.buf = appendEvent(*b.buf, e)
	b.events++
}

// write gives the events, if there are any, to the stream, which ends after them if end is set. Then b is empty.
func (b *burst) write(end bool) sendStatus {
	status := sendUnknown
	if b.s != nil {
		var chunk []byte
		if b.events > 0 {
			chunk = b.s.chunk(b.buf)
		}
		status = b.s.send(chunk, end)
	}
	b.g.met.events.with(status.String()).Add(b.events)
	b.events = 0
	return status
}
