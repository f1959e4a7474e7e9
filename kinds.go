// The kinds of task that come with the program; add yours here. How a task is run and followed is in tasks.go.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"time"
)

// taskFunc is the work of a task. It returns the result, which must have a JSON form, or an error whose text the
// browser sees. It should return soon after ctx ends: its worker is busy until then. A panic fails the task.
type taskFunc func(ctx context.Context, p *reporter) (result any, err error)

// taskKind makes the work of a task from its params, which are a JSON object (perhaps empty). Its error is the client's
// fault, who sees its text.
type taskKind func(params object) (taskFunc, error)

// taskKinds are the kinds of task that run in this process. To add one, write a taskKind and name it here.
func taskKinds() map[string]taskKind {
	return map[string]taskKind{
		"demo":    demoTask,
		"failing": failingTask,
	}
}

// badParam says what a param must be.
func badParam(format string, args ...any) error {
	return badRequest("bad_params", fmt.Sprintf(format, args...))
}

// demoTask takes some steps, with a pause before each.
func demoTask(params object) (taskFunc, error) {
	steps, err := numberParam(params, "steps", 3, 1, 10000)
	if err != nil || steps != math.Trunc(steps) {
		return nil, badParam("steps must be a whole number from 1 to 10000")
	}
	delay, err := numberParam(params, "delay", 0.1, 0, 3600)
	if err != nil {
		return nil, err
	}
	message, err := textParam(params, "message", "demo finished")
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, p *reporter) (any, error) {
		for step := 1.0; step <= steps; step++ {
			if err := sleep(ctx, seconds(delay)); err != nil {
				return nil, err
			}
			p.Report(fmt.Sprintf("step %v of %v", step, steps), step/steps)
		}
		return map[string]any{"message": message, "steps": steps}, nil
	}, nil
}

// failingTask fails after a pause.
func failingTask(params object) (taskFunc, error) {
	delay, err := numberParam(params, "delay", 0.1, 0, 3600)
	if err != nil {
		return nil, err
	}
	message, err := textParam(params, "error_message", "task failed")
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, p *reporter) (any, error) {
		if err := sleep(ctx, seconds(delay)); err != nil {
			return nil, err
		}
		return nil, errors.New(message)
	}, nil
}

// number returns a number among the params, or what it is by default.
func numberParam(params object, name string, byDefault, low, high float64) (float64, error) {
	raw, ok := params[name]
	if !ok {
		return byDefault, nil
	}
	value, err := parseNumber(raw)
	if err != nil || value < low || value > high {
		return 0, badParam("%s must be a number from %v to %v", name, low, high)
	}
	return value, nil
}

// text returns a string among the params, or what it is by default.
func textParam(params object, name, byDefault string) (string, error) {
	value, ok, err := params.str(name)
	switch {
	case err != nil || len(value) > maxTaskText:
		return "", badParam("%s must be a string of at most %d bytes", name, maxTaskText)
	case !ok:
		return byDefault, nil
	}
	return value, nil
}

func seconds(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

var errResultTooLarge = newError(http.StatusRequestEntityTooLarge, "too_large", fmt.Sprintf("result is larger than %d bytes", maxTaskResult))

func encodeResult(result any) (string, error) {
	encoded, err := json.Marshal(result)
	if err != nil {
		return "", errors.New("result has no JSON form")
	}
	return compactResult(encoded)
}

// compactResult returns a result as it is in the events: without white space, and null if there is none.
func compactResult(encoded json.RawMessage) (string, error) {
	result := string(marshal(encoded))
	if len(result) > maxTaskResult {
		return "", errResultTooLarge
	}
	return result, nil
}

// progress is how the work of a task reports on itself. It may be used by several goroutines.
type reporter struct {
	s *TaskService
	t *task
}

// Report tells the followers how far the task is: value from 0 to 1, never less than before, and a text of at most 8
// KiB, beyond which it is cut. After the end of the task it does nothing.
func (p *reporter) Report(text string, value float64) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	switch {
	case p.s.journal.full():
		p.s.policy.dropped.Inc()
	case !p.t.status.finished():
		text = truncate(text)
		p.s.reportLocked(p.t, report{text: &text, value: &value})
	}
}
