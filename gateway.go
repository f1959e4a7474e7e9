// The backend's client of a gateway. The gateway itself is in sidecar.go, send.go and stream.go; what the two say to
// each other is in wire.go. Identifiers are not known here; see connmgr.go.

package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sendLimit bounds one POST to the gateway. It is tried once.
	sendLimit = 5 * time.Second
	// resetLimit bounds how long a start waits for a gateway. If it does not answer by then it is asked again, with a
	// pause of resetPause.
	resetLimit = time.Second
	resetPause = time.Second

	// maxPostingBatches bounds the POSTs under way to a gateway that takes batches: sends that come meanwhile go out
	// together. To any other gateway it is maxPosting, with one event in each.
	maxPostingBatches = 4
	maxPosting        = 128

	// The most that a batch holds. It is far below the gateway's limit, so that nobody waits long for the events of
	// others.
	maxBatchSends = 512
	maxBatchBytes = 1 << 20
)

// gatewayClient sends events to a gateway by POST /internal/send.
//
// A lone send goes out at once. Under load it is group commit: sends that come while others are under way wait, and go
// out together then. A caller waits for the result before it sends more events of the same token, so their order is
// kept.
type gatewayClient struct {
	url       string            // base URL
	transport http.RoundTripper // no http.Client, which costs more and follows redirects

	features atomic.Value // of type features; none until a gateway has called back

	mu      sync.Mutex   // guards the rest
	posting int          // goroutines that post, each one POST after the other
	waiting []*sendBatch // have at most one send with events for each connection, and probes and ends
}

// sendBatch is what goes out in one POST: the lines of one or more sends. Until it does, only the last one gets more.
type sendBatch struct {
	bodies  [][]byte       // of the sends: a line of JSON for each event, or for none; each with its newline
	lines   int            // in bodies
	size    int            // of bodies, in bytes
	answers [][]byte       // one for each line, unless there is err
	err     error          // then nobody knows what became of the lines
	done    sync.WaitGroup // until answers or err are set
}

// sendResult is what became of one send.
type sendResult struct {
	taken    int   // how many events the gateway took, or refused for good
	refused  int   // how many of them it refused
	buffered bool  // the last of them waits for the stream to open
	err      error // why no more: errUnknownToken, or one after which the next event may have been taken or not
}

func newGatewayClient(baseURL string) *gatewayClient {
	return &gatewayClient{
		url: baseURL,
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
func (c *gatewayClient) heard(f features) { c.features.Store(f) }

// can returns what the gateway has said it can do.
func (c *gatewayClient) can() features {
	f, _ := c.features.Load().(features)
	return f
}

// send gives the events to the stream of token, one after the other, or only the first one if the gateway takes no
// batches. If end is set there is one event at most, and the stream ends after it. Without events and end it asks
// whether the stream is there.
func (c *gatewayClient) send(token string, events []event, end bool) sendResult {
	can, limit := c.can(), maxPostingBatches
	if !can.batch {
		events, limit = events[:min(len(events), 1)], maxPosting
	}
	body, lines := encodeSends(token, events, end, can), max(len(events), 1)
	c.mu.Lock()
	var b *sendBatch
	if n := len(c.waiting); n > 0 {
		b = c.waiting[n-1]
	}
	if b == nil || !can.batch || b.lines+lines > maxBatchSends || b.size+len(body) > maxBatchBytes {
		b = &sendBatch{}
		b.done.Add(1)
		c.waiting = append(c.waiting, b)
	}
	first := b.lines
	b.bodies, b.lines, b.size = append(b.bodies, body), first+lines, b.size+len(body)
	if c.posting < limit {
		c.posting++
		go c.post()
	}
	c.mu.Unlock()
	b.done.Wait()
	if b.err != nil {
		return sendResult{err: b.err}
	}
	return readResult(b.answers[first:first+lines], !end && len(events) > 0)
}

// post posts what waits until nothing does.
func (c *gatewayClient) post() {
	for {
		runtime.Gosched() // lets others that are about to send join the batch
		c.mu.Lock()
		if len(c.waiting) == 0 {
			c.posting--
			c.mu.Unlock()
			return
		}
		b := c.waiting[0]
		c.waiting = slices.Delete(c.waiting, 0, 1)
		c.mu.Unlock()
		b.answers, b.err = c.do(b)
		b.done.Done()
	}
}

// reset asks the gateway to end all streams that it has: they are those of an earlier backend, perhaps one that was
// killed, and their browsers would wait for ever. If the first try is not answered, it goes on in the background until
// ctx ends, or until a gateway calls back that announces no features, and so knows no reset. Streams that this backend
// has by then end as well, and come back.
func (c *gatewayClient) reset(ctx context.Context, callbackSecret secret, log *slog.Logger) {
	err := c.tryReset(ctx, resetLimit, callbackSecret, log)
	if err == nil {
		return
	}
	log.Warn("the gateway does not answer yet", "err", err)
	go func() {
		for err != nil {
			if sleep(ctx, resetPause) != nil {
				return
			}
			if f, heard := c.features.Load().(features); heard && !f.known {
				return
			}
			// For longer than before, or a slow gateway would be reset again and again.
			err = c.tryReset(ctx, sendLimit, callbackSecret, log)
		}
		log.Info("the gateway answers now")
	}()
}

// tryReset returns an error unless the gateway itself answered. A proxy in front of it may answer anything.
func (c *gatewayClient) tryReset(ctx context.Context, limit time.Duration, callbackSecret secret, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	header := http.Header{"Content-Type": {jsonType}, "Authorization": {"Bearer " + string(callbackSecret)}}
	status, answer, err := postTo(ctx, c.transport, c.url+"/internal/reset", header, []byte("{}"), maxBatchBytes)
	o, _ := parseObject(answer)
	switch {
	case err != nil:
		return err
	case status == http.StatusUnauthorized && o["error"] != nil:
		log.Warn("the gateway has another callback secret: is SSE_CALLBACK_SECRET the one in its CALLBACK_URL?")
		return nil
	case status == http.StatusOK && o["status"] != nil:
		return nil
	}
	return c.statusError(status)
}

// statusError says what a status means that is not one of the gateway's own answers.
func (c *gatewayClient) statusError(status int) error {
	if status == http.StatusNotFound || status == http.StatusMethodNotAllowed {
		return fmt.Errorf("the gateway at %s does not serve /internal/send: is INTERNAL_ADDR set there?", c.url)
	}
	return fmt.Errorf("posting to the gateway: status %d", status)
}

// do posts the batch, and returns the answers to its lines. A single line goes out as the only thing that every gateway
// takes.
func (c *gatewayClient) do(b *sendBatch) (answers [][]byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), sendLimit)
	defer cancel()
	mediaType, body := jsonType, bytes.TrimSuffix(b.bodies[0], []byte("\n"))
	if b.lines > 1 {
		mediaType, body = ndjson, slices.Concat(b.bodies...)
	}
	header := http.Header{"Content-Type": {mediaType}}
	status, answer, err := postTo(ctx, c.transport, c.url+"/internal/send", header, body, maxBatchBytes)
	switch {
	case err != nil:
		return nil, err
	case b.lines == 1:
		line, err := c.oneAnswer(status, answer)
		return [][]byte{line}, err
	case status != http.StatusOK:
		return nil, c.statusError(status)
	}
	answers = bytes.Split(bytes.TrimSpace(answer), []byte("\n"))
	if len(answers) != b.lines {
		return nil, fmt.Errorf("reading the answer: %d results to a batch of %d", len(answers), b.lines)
	}
	return answers, nil
}

// oneAnswer returns what a batch would have been answered to its only line.
func (c *gatewayClient) oneAnswer(status int, answer []byte) (line []byte, err error) {
	anyWords := !c.can().known // will do: another make of gateway has its own
	switch {
	case status == http.StatusOK && !anyWords:
		return answer, nil
	case status == http.StatusOK && bytes.Contains(answer, []byte(`"buffered"`)):
		return []byte(batchBuffered), nil
	case status == http.StatusOK:
		return []byte(batchOK), nil
	}
	o, _ := parseObject(answer)
	said, _, _ := o.str("error")
	switch {
	case status == http.StatusNotFound && (said == errUnknownToken.Error() || anyWords):
		return []byte(batchUnknown), nil
	case (status == http.StatusBadRequest || status == http.StatusRequestEntityTooLarge) && (said != "" || anyWords):
		return fmt.Appendf(nil, `{"status":%d}`, status), nil
	}
	return nil, c.statusError(status) // something in between has answered, or it is no gateway
}

// readResult reads the answers to the lines of one send. If it skips, an event that is refused for good is skipped, and
// the stream goes on.
func readResult(lines [][]byte, skips bool) (r sendResult) {
	for _, line := range lines {
		if string(line) == batchOK { // as most are, which spares reading it
			r.taken, r.buffered = r.taken+1, false
			continue
		}
		var status []byte
		pick(line, member{"status", &status, nil}) // nil if it is no answer of a gateway
		switch answer := string(status); {
		case answer == `"ok"`, answer == `"buffered"`:
			r.buffered = answer == `"buffered"`
		case answer == "404":
			r.err = errUnknownToken
			return r
		case skips && (answer == "400" || answer == "413"):
			r.refused++
		default:
			r.err = fmt.Errorf("reading the answer: %.100q", line)
			return r
		}
		r.taken++
	}
	return r
}
