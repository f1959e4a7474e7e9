// The backend's client of a gateway. The gateway itself is sidecar.go, send.go and
// stream.go; what both say to each other is in wire.go. Identifiers are not known
// here; see connmgr.go.

package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sendLimit bounds one POST to the gateway. It is tried once.
	sendLimit = 5 * time.Second
	// resetLimit bounds how long a start waits for a gateway. One that did not
	// answer by then is asked again after each resetPause.
	resetLimit = time.Second
	resetPause = time.Second
	// dialLimit bounds a dial, and a TLS handshake. A Transport goes on with
	// them when the request that they are for has ended.
	dialLimit = 5 * time.Second

	// So many POSTs are under way at once, to a gateway that takes batches and
	// to one that does not. What comes meanwhile waits, and in the first case
	// goes out together.
	maxPostingBatches = 4
	maxPosting        = 128

	// The most that a batch holds. It is far from the gateway's own limit, so
	// that nobody waits long for the others' events.
	maxBatchSends = 512
	maxBatchBytes = 1 << 20
)

// gatewayClient sends events to a gateway by POST /internal/send.
//
// A send on its own goes out at once. Under load it is group commit: sends
// that come while others are under way wait, and the first of them to get its
// turn takes the rest along. The caller waits for the result before it sends
// the next events of a token, so their order is kept.
type gatewayClient struct {
	url       string            // with /internal/
	transport http.RoundTripper // an http.Client would cost more, and follow redirects

	batches atomic.Bool // the gateway takes them

	mu      sync.Mutex     // guards the rest
	posting int            // POSTs under way
	waiting []*waitingSend // one of each token at most, besides probes and ends
}

// waitingSend is one send that waits: for its turn, or for the result that
// somebody else's POST brings.
type waitingSend struct {
	lines int            // of JSON
	body  []byte         // the lines, with a newline between them
	turn  sync.WaitGroup // until somebody has done it, or it is its turn
	sendResult
	done bool // the result is there; otherwise it is this send's turn
}

// sendResult is what became of one send.
type sendResult struct {
	taken    int   // how many of the events the gateway took
	buffered bool  // the last of them waits for its stream to open
	err      error // of the next: errUnknownToken, or it is not known whether the gateway took it
}

func newGatewayClient(baseURL string) *gatewayClient {
	return &gatewayClient{
		url: baseURL + "/internal/",
		transport: &http.Transport{
			DialContext:         dial,
			TLSHandshakeTimeout: dialLimit,
			MaxIdleConnsPerHost: maxPosting,
			IdleConnTimeout:     4 * time.Second, // before a Node.js gateway closes them, after 5
			WriteBufferSize:     16 << 10,        // most batches go out in one write
			DisableCompression:  true,
		},
	}
}

// heard notes what the gateway says it can do.
func (c *gatewayClient) heard(features string) {
	batches := false
	for feature := range strings.SplitSeq(features, ",") {
		batches = batches || strings.TrimSpace(feature) == featureBatch
	}
	c.batches.Store(batches)
}

// send gives the events to the stream of token, one after the other, or only
// the first if the gateway takes no batches. If end is set, there is one event
// at most, after which the stream ends. Without events and end it asks whether
// the stream is alive.
func (c *gatewayClient) send(token string, events []event, end bool) sendResult {
	batches := c.batches.Load()
	limit := maxPosting
	if batches {
		limit = maxPostingBatches
	} else if len(events) > 1 {
		events = events[:1]
	}
	s := &waitingSend{lines: max(len(events), 1), body: encodeSends(token, events, end)}
	c.mu.Lock()
	if c.posting < limit {
		c.posting++
		c.mu.Unlock()
	} else {
		s.turn.Add(1)
		c.waiting = append(c.waiting, s)
		c.mu.Unlock()
		s.turn.Wait()
		if s.done {
			return s.sendResult
		}
	}
	if batches {
		runtime.Gosched() // others that are about to send come along
	}
	c.mu.Lock()
	batch := c.takeLocked(s)
	c.mu.Unlock()

	c.post(batch)

	for _, other := range batch[1:] {
		other.done = true
		other.turn.Done()
	}
	c.mu.Lock()
	if len(c.waiting) > 0 {
		next := c.waiting[0]
		c.waiting = slices.Delete(c.waiting, 0, 1)
		next.turn.Done()
	} else {
		c.posting--
	}
	c.mu.Unlock()
	return s.sendResult
}

// reset tells a gateway that runs already that its streams are not known
// here, so that it ends them and the browsers come back. Otherwise, after a
// backend that was killed, they would wait for ever. It returns after one try;
// if that brought no answer, it goes on in the background until ctx ends, and
// streams of this backend may have to come back, too. A gateway that does not
// know of it is fine.
func (c *gatewayClient) reset(ctx context.Context, callbackSecret secret, log *slog.Logger) {
	err := c.tryReset(ctx, resetLimit, callbackSecret, log)
	if err == nil {
		return
	}
	log.Warn("the gateway does not answer yet", "err", err)
	go func() {
		for err != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(resetPause):
				err = c.tryReset(ctx, sendLimit, callbackSecret, log) // or one that is slow would be reset for ever
			}
		}
		log.Info("the gateway answers now")
	}()
}

// tryReset returns an error unless the gateway answered. An answer of 5xx may
// be that of a proxy before it.
func (c *gatewayClient) tryReset(ctx context.Context, limit time.Duration, callbackSecret secret, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	header := http.Header{"Content-Type": {jsonType}, "Authorization": {"Bearer " + string(callbackSecret)}}
	status, _, err := postTo(ctx, c.transport, c.url+"reset", header, []byte("{}"), maxBatchBytes)
	switch {
	case status == 0:
		return err
	case status >= 500:
		return fmt.Errorf("gateway answered %d", status)
	case status == http.StatusUnauthorized:
		log.Warn("the gateway has another callback secret")
	}
	return nil
}

// takeLocked returns s and what may go out with it.
func (c *gatewayClient) takeLocked(s *waitingSend) []*waitingSend {
	n, lines, size := 0, s.lines, len(s.body)
	for c.batches.Load() && n < len(c.waiting) {
		lines += c.waiting[n].lines
		size += len(c.waiting[n].body)
		if lines > maxBatchSends || size > maxBatchBytes {
			break
		}
		n++
	}
	batch := append([]*waitingSend{s}, c.waiting[:n]...)
	c.waiting = slices.Delete(c.waiting, 0, n)
	return batch
}

// post sends the batch in one POST and sets the results.
func (c *gatewayClient) post(batch []*waitingSend) {
	var err error
	if len(batch) == 1 && (batch[0].lines == 1 || !c.batches.Load()) {
		first, _, _ := bytes.Cut(batch[0].body, []byte("\n"))
		batch[0].sendResult, err = c.postOne(first)
	} else {
		err = c.postBatch(batch)
	}
	if err != nil {
		for _, s := range batch {
			s.sendResult = sendResult{err: err}
		}
	}
}

func (c *gatewayClient) postOne(body []byte) (r sendResult, err error) {
	status, answer, err := c.do(jsonType, body)
	switch {
	case err != nil:
		return r, err
	case status == http.StatusNotFound:
		return sendResult{err: errUnknownToken}, nil
	case status != http.StatusOK:
		return r, fmt.Errorf("gateway answered %d", status)
	}
	return sendResult{taken: 1, buffered: bytes.Contains(answer, []byte(`"buffered"`))}, nil
}

func (c *gatewayClient) postBatch(batch []*waitingSend) error {
	want, size := 0, 0
	for _, s := range batch {
		want += s.lines
		size += len(s.body) + len("\n")
	}
	body := make([]byte, 0, size)
	for _, s := range batch {
		body = append(append(body, s.body...), '\n')
	}
	status, answer, err := c.do(ndjson, body)
	if err != nil {
		return err
	}
	lines := bytes.Split(bytes.TrimSpace(answer), []byte("\n"))
	if status != http.StatusOK || len(lines) != want {
		c.heard("") // it is another gateway than before
		return fmt.Errorf("gateway answered %d and %d results to a batch of %d", status, len(lines), want)
	}
	for _, s := range batch {
		s.sendResult = readResult(lines[:s.lines])
		lines = lines[s.lines:]
	}
	return nil
}

// readResult reads the lines that answer those of one send.
func readResult(lines [][]byte) (r sendResult) {
	for _, line := range lines {
		switch string(line) {
		case batchOK:
			r.buffered = false
		case batchBuffered:
			r.buffered = true
		case batchUnknown:
			r.err = errUnknownToken
			return r
		default:
			r.err = fmt.Errorf("gateway answered %q", line)
			return r
		}
		r.taken++
	}
	return r
}

func (c *gatewayClient) do(contentType string, body []byte) (status int, answer []byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), sendLimit)
	defer cancel()
	return postTo(ctx, c.transport, c.url+"send", http.Header{"Content-Type": {contentType}}, body, maxBatchBytes)
}
