// What backend and gateway say to each other: events, the bodies of callbacks and of /internal/send, and the headers.
// Who says it when is in gateway.go and sidecar.go.

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unique"
)

// featuresHeader is a header of callbacks: what the gateway can do, separated by commas.
const featuresHeader = "Sse-Gateway-Features"

// The features that a backend makes use of: /internal/send takes batches, and an event may have a retry.
// gatewayFeatures is what this gateway announces.
const (
	featureBatch    = "batch"
	featureRetry    = "retry"
	gatewayFeatures = featureBatch + ", id, " + featureRetry + ", heartbeat"
)

// features is what a gateway can do. Another make of gateway announces nothing; then all are false.
type features struct{ known, batch, retry bool }

func parseFeatures(header string) features {
	names := strings.Fields(strings.ReplaceAll(header, ",", " "))
	return features{len(names) > 0, slices.Contains(names, featureBatch), slices.Contains(names, featureRetry)}
}

// orderHeader is a header of connect callbacks, <run>-<n>: it is the nth request for a stream since the gateway was
// started, and run is a random name for that start. Callbacks may overtake each other.
const orderHeader = "Sse-Gateway-Request"

// requestOrder is the place of a request among those of a run of the gateway. The zero value means that it is not
// known.
type requestOrder struct {
	run unique.Handle[string]
	n   uint64
}

func parseOrder(header string) requestOrder {
	name, number, _ := strings.Cut(header, "-")
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || name == "" {
		return requestOrder{}
	}
	return requestOrder{unique.Make(name), n}
}

// before reports whether the request is known to be older than other.
func (o requestOrder) before(other requestOrder) bool {
	return o.run == other.run && o.n < other.n
}

// event is one message to a browser. An empty ID or Name is left out.
type event struct {
	ID    string `json:"id,omitempty"`
	Name  string `json:"name"`
	Data  string `json:"data"`
	Retry int    `json:"retry,omitempty"` // reconnection time in milliseconds; 0 leaves it unchanged

	others string // what follows ID on the wire: of a page's event, the positions in the other logs
}

func (e *event) appendID(b []byte) []byte { return append(append(b, e.ID...), e.others...) }

// errUnknownToken says that the gateway does not have the stream, or no longer.
var errUnknownToken = errors.New("unknown token")

// closeID is the ID of the last event of a stream.
const closeID = "close"

// closeEvent returns the last event of a stream. A browser that reconnects after it sends closeID as its last event ID,
// and is answered 410, which stops it. Some clients reconnect nevertheless: for them it has a long reconnection time.
func closeEvent(reason string) event {
	retry := closeRetry + rand.IntN(closeRetry+1)
	return event{ID: closeID, Name: "connection_close", Data: fmt.Sprintf(`{"reason":%q}`, reason), Retry: retry}
}

// closeRetry is the least reconnection time after the end of a stream, in milliseconds. The most is twice that.
const closeRetry = 10_000

// ndjson is the media type of a batch on /internal/send, with a send on each line, and of a body of reports.
const ndjson = "application/x-ndjson"

// The lines that answer a send of a batch. Any other is {"status":N} or {"status":400,"error":"…"}.
const (
	batchOK       = `{"status":"ok"}`
	batchBuffered = `{"status":"buffered"}`
	batchUnknown  = `{"status":404}`
)

// encodeSends returns the body of POST /internal/send: a line for each event, or one without.
func encodeSends(token string, events []event, end bool, can features) []byte {
	if len(events) == 0 {
		return append(appendSend(nil, token, nil, end), '\n')
	}
	size := 0
	for _, e := range events {
		size += 128 + len(e.others) + len(e.Data) + len(e.Data)/4 // and room for escapes
	}
	b := make([]byte, 0, size)
	for _, e := range events {
		if !can.retry {
			e.Retry = 0
		}
		b = append(appendSend(b, token, &e, end), '\n')
	}
	return b
}

// appendSend appends the object for one event, or for none.
func appendSend(b []byte, token string, e *event, end bool) []byte {
	b = append(b, `{"token":`...)
	b = appendString(b, token)
	if e != nil {
		b = append(b, `,"event":{"data":`...)
		b = appendString(b, e.Data)
		if e.ID != "" {
			b = append(e.appendID(append(b, `,"id":"`...)), '"') // which has nothing to escape
		}
		if e.Name != "" {
			b = appendString(append(b, `,"name":`...), e.Name)
		}
		if e.Retry != 0 {
			b = strconv.AppendInt(append(b, `,"retry":`...), int64(e.Retry), 10)
		}
		b = append(b, '}')
	}
	if end {
		b = append(b, `,"close":true`...)
	}
	return append(b, '}')
}

// callbackAnswer is what the backend said to a connect callback.
type callbackAnswer struct {
	event     sentEvent
	end       bool
	beatEvent bool // this stream's heartbeats are events
}

// callback is what a backend needs of a callback.
type callback struct {
	action      string
	token       string
	url         string // the raw request target of the stream
	lastEventID string // its header Last-Event-ID
	order       string // orderHeader of the callback
}

// encodeRequest returns the request as both callbacks have it: the raw target, and the headers with lower-case names
// and one value each. Bytes that are not UTF-8 become U+FFFD itself, as an escape would be longer.
func encodeRequest(r *http.Request) json.RawMessage {
	b := appendString(append(make([]byte, 0, 1<<10), `{"url":`...), r.RequestURI)
	b = append(b, `,"headers":{"host":`...)
	b = appendString(b, r.Host)
	for name := range r.Header {
		b = append(b, ',')
		b = appendString(b, strings.ToLower(name))
		b = append(b, ':')
		b = appendString(b, headerText(r, name))
	}
	return bytes.Clone(append(b, "}}"...)) // kept for as long as the stream: without spare room
}

// headerText returns the value of a header, as the callbacks have it.
func headerText(r *http.Request, name string) string {
	separator := ", "
	if name == "Cookie" {
		separator = "; "
	}
	return strings.ToValidUTF8(strings.Join(r.Header[name], separator), "\uFFFD")
}

// encodeCallback returns the body of a callback. Without a reason it has none.
func encodeCallback(action, reason, token string, request json.RawMessage) []byte {
	if reason != "" {
		reason = `"reason":"` + reason + `",`
	}
	return fmt.Appendf(nil, `{"action":"%s",%s"token":"%s","request":%s}`, action, reason, token, request)
}

// maxRetry is the most milliseconds that an event may set, a day.
const maxRetry = 86_400_000

var (
	errNoData     = badRequest("bad_event", "event data is missing")
	errEventField = badRequest("bad_event", "event name and id must not contain CR, LF or NUL")
	errEventRetry = badRequest("bad_event", "event retry must be a whole number of milliseconds from 1 to 86400000")
)

// eventFields has the member "event" of an object as its text, and the values in it.
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
		e.oneLine = len(e.data) == len(f.data)-len(`""`) // nothing was escaped
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

// parseBool decodes a JSON bool. An absent one is false.
func parseBool(raw []byte) (bool, error) {
	switch string(raw) {
	case "true":
		return true, nil
	case "false", "":
		return false, nil
	}
	return false, errFieldType
}
